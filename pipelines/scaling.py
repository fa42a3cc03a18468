"""`python -m pipelines.scaling`: the command of pipelines/planning/cluster_plan.py."""

from pipelines.planning.cluster_plan import main

if __name__ == "__main__":
    main()
