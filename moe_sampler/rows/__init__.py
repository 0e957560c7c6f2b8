"""A file of prompts, a picture each: the file's rows, batches of them, and the folder they are written to."""
