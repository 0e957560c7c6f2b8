"""Demo experts: a tiny Sol and Lune trained on procedurally drawn, captioned scenes."""
