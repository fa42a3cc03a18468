"""`python -m pipelines.plan`: the command of pipelines/planning/memory_plan.py."""

from pipelines.planning.memory_plan import main

if __name__ == "__main__":
    main()
