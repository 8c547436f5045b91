"""The bodies of the commands, one file for each purpose; app.py gives them their names. Imports everything below."""
