"""The small C library behind the native backend; `interface` loads it."""
