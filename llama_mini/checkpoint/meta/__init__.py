"""Meta's directories: params.json, consolidated weights, and pickles, which only conversion reads."""
