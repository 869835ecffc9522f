"""What runs leave behind: records, one JSON line a case, their digests, and runs that were left and went on."""
