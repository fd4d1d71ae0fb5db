"""One file per command. At the top of each only what its help needs: engines and tables are imported when it runs."""
