"""`python -m pipelines.export`: the command of pipelines/export/export.py."""

from pipelines.export.export import main

if __name__ == "__main__":
    main()
