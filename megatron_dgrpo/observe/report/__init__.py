"""`dgrpo report RUN`: one HTML page about a run, with everything in it. Needs the base install alone."""
