# SPDX-License-Identifier: Apache-2.0
"""`python -m perceiver_flow_ros` is the command `perceiver_flow`."""

from perceiver_flow_ros.commands.main import main

if __name__ == '__main__':
    raise SystemExit(main())
