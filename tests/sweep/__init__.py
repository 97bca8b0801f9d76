"""A sweep over what is done to a program: kills, full disks, foreign folders, hostile clients."""
