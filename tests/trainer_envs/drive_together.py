"""Runs in the environment of together: the check that its client makes before an upload, as JSON.

drive_together.py FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from together.lib.utils.files import check_file

if __name__ == "__main__":
    print(json.dumps(check_file(Path(sys.argv[1])), default=str))
