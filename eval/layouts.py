"""`python -m eval.layouts`: the command of eval/leaderboard/layouts.py."""

from eval.leaderboard.layouts import main

if __name__ == "__main__":
    main()
