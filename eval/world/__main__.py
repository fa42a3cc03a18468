"""`python -m eval.world`: the commands of eval/world/folder.py."""

from eval.world.folder import main

if __name__ == "__main__":
    main()
