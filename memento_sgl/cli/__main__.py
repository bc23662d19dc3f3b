"""The program `memento`, and `python -m memento_sgl.cli`."""


def main() -> None:
    """Run the command line. Ctrl-C is one line while it is still being imported, too."""
    try:
        from memento_sgl.cli.app import main as run
    except KeyboardInterrupt:
        import sys

        print("interrupted", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
