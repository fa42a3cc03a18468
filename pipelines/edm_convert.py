"""`python -m pipelines.edm_convert`: the command of pipelines/export/edm_convert.py."""

from pipelines.export.edm_convert import main

if __name__ == "__main__":
    main()
