"""`python -m pipelines.sana`: the command of pipelines/families/sana.py."""

from pipelines.families.sana import main

if __name__ == "__main__":
    main()
