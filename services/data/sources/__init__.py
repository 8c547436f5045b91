"""Sources of records, one file each: a file or hub data set, a log, or a user's own."""
