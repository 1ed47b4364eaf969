"""Train a linear autoencoder: `python jobs/train_linear.py --config jobs/train_linear.yaml`.

The same command resumes a run that was interrupted. As a Ray job: `ray job submit ... -- python
jobs/train_linear.py --config FILE`. Settings are in the file; NAME=VALUE overrides one, e.g.
`source=~/Music linearity.max_gain=2 network.width=32`.
"""

from __future__ import annotations

import argparse
import logging
import sys

from latentmill.errors import LatentmillError
from latentmill.training.job import run
from latentmill.training.settings import load_settings, parse_options


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file of settings, such as jobs/train_linear.yaml")
    parser.add_argument(
        "--no-linearity", action="store_true", help="train the baseline: no mixtures, no gains"
    )
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="overrides the file")
    args = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(message)s")
    try:
        options = parse_options(args.settings)
        if args.no_linearity:
            options["linearity"] = None
        run(load_settings(args.config, options))
    except LatentmillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
