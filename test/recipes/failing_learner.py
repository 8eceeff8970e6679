# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The recipe with a learner that raises in its third update; takes the recipe's arguments.

python failing_learner.py SCRIPT [ARGUMENT ...]
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from torchrl_dvla.objectives import GRPOLoss

NUM_UPDATES = 2


def main(script: str) -> None:
    forward = GRPOLoss.forward

    def fail(self, *args, **kwargs):
        if self.version >= NUM_UPDATES:
            raise ArithmeticError(f"injected after {NUM_UPDATES} updates")
        return forward(self, *args, **kwargs)

    GRPOLoss.forward = fail
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    del sys.argv[0]
    main(sys.argv[0])
