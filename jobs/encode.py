"""A run as a Ray job: `ray job submit --working-dir . -- python jobs/encode.py --config FILE`.

The same as `latentmill encode --config FILE`: further options win over the file.
"""

import sys

from latentmill.cli.entry import main

if __name__ == "__main__":
    sys.argv.insert(1, "encode")
    main()
