"""Trains, validates, tests and reports: python train.py algo=somaml +zeroing=true

The program is src/fewshot/train.py; a wheel and an image have it as python -m fewshot.train.
"""

from fewshot.processes.surroundings import settle

if __name__ == "__main__":
    settle()
    from fewshot.train import main

    main()
