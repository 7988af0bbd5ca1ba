"""Any source to ArrayRecord shards, with statistics: launch/prepare_data.py."""
