"""Other projects' own tests, run against ReMix: fetched when they are run, never copied in."""
