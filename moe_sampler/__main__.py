"""`python -m moe_sampler` is the command `moe-sampler`."""

from .cli import main

if __name__ == "__main__":
    main()
