"""What is done with a finished run: scored, asked, looked into, shown. One file for each."""
