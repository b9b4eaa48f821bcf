"""An application on Django that knows nothing but DATABASE_URL, read as the usual helpers read it."""
import os
import threading
from urllib.parse import parse_qsl, unquote, urlsplit

import django
from django.conf import settings

url = urlsplit(os.environ["DATABASE_URL"])
settings.configure(
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "HOST": url.hostname,
            "PORT": url.port,
            "USER": unquote(url.username),
            "PASSWORD": unquote(url.password),
            "NAME": unquote(url.path[1:]),
            "CONN_MAX_AGE": None,
            "OPTIONS": dict(parse_qsl(url.query)),
        }
    },
    USE_TZ=True,
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
)
django.setup()

from django.db import connection, models, transaction  # noqa: E402


class Item(models.Model):
    name = models.CharField(max_length=50)
    number = models.IntegerField()

    class Meta:
        app_label = "app"
        db_table = "exec_dj_items"


with connection.schema_editor() as editor:
    editor.create_model(Item)


def work(me):
    for number in range(20):
        with transaction.atomic():
            item = Item.objects.create(name=f"worker {me}", number=number)
        assert Item.objects.get(id=item.id).name == f"worker {me}"
    assert len(list(Item.objects.filter(name=f"worker {me}").iterator(chunk_size=7))) == 20
    connection.close()


threads = [threading.Thread(target=work, args=(me,)) for me in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert Item.objects.count() == 80
print("ok")
