"""What makes recall traces learn: ablations on four rooms, see README.md."""
