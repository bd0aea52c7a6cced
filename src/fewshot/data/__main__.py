"""Images made ready before any run needs them: python -m fewshot.data prepare dataset=omniglot

On a cluster whose nodes have no network this is for the machine that has one.
"""

import argparse
import logging

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import instantiate

from fewshot.config import CONF, UserError, check, check_overrides, one_line_errors


def prepare(overrides: list[str]) -> None:
    """Downloads what is missing, decodes the images and leaves them in the cache; says which and where.

    Raises:
        UserError: as a run with these overrides would.
    """
    check_overrides(overrides)
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            cfg = compose("config", overrides)
    except HydraException as error:
        raise UserError(str(error)) from None
    check(cfg)
    from fewshot.data.images import cache_folder

    splits = instantiate(cfg.dataset.source)
    for name, split in splits.items():
        print(f"{cfg.dataset.name} {name}: {len(split.names)} classes, {len(split.images)} images")
    print(f"Ready in {cache_folder(cfg.dataset.cache)}; where runs use another cache, give them dataset.cache")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m fewshot.data", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="prepare")
    command = commands.add_parser("prepare", help="downloads and decodes the images of a dataset into the cache")
    command.add_argument("overrides", nargs="*", metavar="dataset=NAME", help="and its knobs, as for train.py")
    asked = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    with one_line_errors():
        prepare(asked.overrides)


if __name__ == "__main__":
    main()
