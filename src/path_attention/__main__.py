"""``python -m path_attention``: the command line, also where its script is not on the path."""

from path_attention.cli import main

if __name__ == "__main__":
    main()
