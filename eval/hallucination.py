"""`python -m eval.hallucination`: the command of eval/metrics/hallucination.py."""

from eval.metrics.hallucination import main

if __name__ == "__main__":
    main()
