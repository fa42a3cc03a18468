"""`python -m eval.leaderboard`: the command of eval/leaderboard/commands.py."""

from eval.leaderboard.commands import main

if __name__ == "__main__":
    main()
