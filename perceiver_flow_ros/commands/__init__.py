# SPDX-License-Identifier: Apache-2.0
"""What people type: one small file per subcommand of `perceiver_flow`."""
