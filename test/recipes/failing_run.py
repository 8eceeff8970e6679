# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The command line with a fault after a training's second update.

python failing_run.py learner|evaluation COMMAND [ARGUMENT ...]
"""

from __future__ import annotations

import sys

from torchrl_dvla import __main__ as command_line
from torchrl_dvla.collectors.evaluation import Evaluation
from torchrl_dvla.objectives import GRPOLoss

NUM_UPDATES = 2


def main(what: str, *arguments: str) -> None:
    forward, result = GRPOLoss.forward, Evaluation.result

    def fail_to_learn(self, *args, **kwargs):
        if self.version >= NUM_UPDATES:
            raise ArithmeticError(f"injected after {NUM_UPDATES} updates")
        return forward(self, *args, **kwargs)

    def fail_to_evaluate(self, timeout_s=None):
        found = result(self, timeout_s)
        if found.policy_version >= NUM_UPDATES:
            raise RuntimeError(f"injected after {NUM_UPDATES} updates")
        return found

    if what == "learner":
        GRPOLoss.forward = fail_to_learn
    else:
        Evaluation.result = fail_to_evaluate
    sys.exit(command_line.main(arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
