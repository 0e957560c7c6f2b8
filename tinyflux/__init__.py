"""TinyFlux, the student: a small Flux-like transformer that learns from Sol and Lune."""
