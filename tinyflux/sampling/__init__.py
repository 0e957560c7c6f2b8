"""The student as an expert and as a pipeline, alone or guided by Sol and Lune."""
