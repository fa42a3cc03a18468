"""`python -m eval.watch`: the command of eval/leaderboard/select_checkpoint.py."""

from eval.leaderboard.select_checkpoint import main

if __name__ == "__main__":
    main()
