"""`python -m service` is `ctr`."""

from service.cli import main

if __name__ == "__main__":
    main()
