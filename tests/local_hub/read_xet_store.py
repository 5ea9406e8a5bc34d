"""Write files of a Xet store to disk: `read_xet_store.py local://STORE`, and [[xet hash, size, path], …] on stdin."""

import json
import sys

from hf_xet import XetFileInfo, XetSession

with XetSession().new_file_download_group(endpoint=sys.argv[1]) as group:
    for xet_hash, size, path in json.load(sys.stdin):
        group.start_download_file(XetFileInfo(xet_hash, size), path)
