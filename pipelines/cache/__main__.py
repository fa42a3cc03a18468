"""`python -m pipelines.cache`: the command of pipelines/cache/encodings.py."""

from pipelines.cache.encodings import main

if __name__ == "__main__":
    main()
