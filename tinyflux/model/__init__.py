"""The student itself: its configuration, blocks, conditioning, and reading it from files."""
