"""Entry script of a Ray job: `ray job submit ... -- python jobs/encode.py --config FILE`.

Equivalent to `latentmill encode --config FILE`. Options on the command line override the file.
"""

import sys

from latentmill.cli.entry import main

if __name__ == "__main__":
    sys.argv.insert(1, "encode")
    main()
