"""What each command does; `cli` has a row for each, and `options` says what it may be told."""
