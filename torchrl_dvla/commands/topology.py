# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a cluster consists of: this machine, the nodes of a Ray cluster, or those of a file.

It is printed in the form that `plan --cluster` reads.

  torchrl-dvla topology --address auto > cluster.yaml
"""

from __future__ import annotations

import argparse

from torchrl_dvla.topology import ClusterSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What follows the command."""
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--address", metavar="ADDRESS", help="of a Ray cluster, e.g. auto")
    given.add_argument("--file", metavar="FILE", help="YAML file that declares the nodes")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for nodes to answer")


def run(args: argparse.Namespace) -> int:
    """Prints it."""
    if args.file is not None:
        cluster = ClusterSpec.from_yaml(args.file)
    elif args.address is not None:
        cluster = ClusterSpec.from_ray(args.address, timeout_s=args.timeout)
    else:
        cluster = ClusterSpec.local()
    print(cluster.to_yaml(), end="")
    return 0
