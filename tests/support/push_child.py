"""A process that forks for each push, so that a test can kill it at any request.

Reads lines of JSON: the arguments of `push`, and prints the exit status of each: that of the
process, or minus the signal that ended it.
"""

from __future__ import annotations

import json
import os
import sys

import fsspec
from huggingface_hub import constants

from latentmill.curation import copying
from latentmill.errors import LatentmillError
from latentmill.publishing import card, hub  # noqa: F401  imported once, before the forks


def main() -> None:
    constants.HF_HUB_DISABLE_XET = True  # the hub of the tests has no such storage
    for line in sys.stdin:
        given = json.loads(line)
        fsspec.config.conf["hf"] = {"endpoint": given["endpoint"], "token": given["token"]}
        hub.BATCH_UNITS, copying.SHARD_SIZE = given["units"], given["shard_size"]
        child = os.fork()
        if not child:
            try:
                hub.push(given["store"], given["url"], jobs=given["jobs"])
            except LatentmillError as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(error.exit_code)
            os._exit(0)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
