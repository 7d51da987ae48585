"""The main job: recall traces beside A2C on four rooms, with TorchRL's own parts."""
