"""The student's training: task, objectives, teachers, settings."""
