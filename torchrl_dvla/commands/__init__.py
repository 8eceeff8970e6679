# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Commands of ``python -m torchrl_dvla`` and ``torchrl-dvla``, one a file.

Each file has ``add_arguments(parser)`` and ``run(args)``, which returns the exit code. A file is
imported when its command is called: the doctor, and the list of commands, need no torch.
"""

__all__: list[str] = []
