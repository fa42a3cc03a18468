"""`python -m pipelines.plan`: the command of pipelines/planning/command.py."""

from pipelines.planning.command import main

if __name__ == "__main__":
    main()
