"""`python -m pipelines.sana`: the command of pipelines/export/sana_convert.py."""

from pipelines.export.sana_convert import main

if __name__ == "__main__":
    main()
