"""`python -m recog_fast` is `recog-fast`."""

from recog_fast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
