"""Other projects' tests of OpenAI-compatible servers, run against ours: scripts/server_suites.py."""
