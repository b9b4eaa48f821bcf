"""An application on Django with its defaults, server-side cursors on, a role assumed: argv is host, port, user and the
application's name."""
import sys

import django
from django.conf import settings

host, port, user, me = sys.argv[1:5]
settings.configure(
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "HOST": host,
            "PORT": port,
            "USER": user,
            "NAME": user,
            "CONN_MAX_AGE": None,
            "OPTIONS": {"assume_role": f"{user}_{me}"},
        }
    },
    USE_TZ=True,
    TIME_ZONE="Asia/Kolkata" if me == "one" else "Europe/Paris",
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
)
django.setup()

from django.db import connection, models, transaction  # noqa: E402


class Item(models.Model):
    name = models.CharField(max_length=50)
    number = models.IntegerField(null=True)

    class Meta:
        app_label = "app"
        db_table = f"dj_{me}"


with connection.schema_editor() as editor:
    editor.create_model(Item)
for n in range(60):
    Item.objects.create(name=f"{me} {n}", number=n)
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_user, current_setting('TimeZone')")
        assert cursor.fetchone() == (f"{user}_{me}", "UTC")
# A cursor on the server, outside a transaction (WITH HOLD) and inside.
assert [item.number for item in Item.objects.order_by("id").iterator(chunk_size=7)] == list(range(60))
with transaction.atomic():
    assert len(list(Item.objects.order_by("id").iterator(chunk_size=7))) == 60
try:
    with transaction.atomic():
        Item.objects.update(number=0)
        raise ZeroDivisionError
except ZeroDivisionError:
    pass
with transaction.atomic():
    Item.objects.filter(number__in=range(10)).delete()
    with transaction.atomic():
        Item.objects.bulk_create([Item(name="bulk", number=n) for n in range(10)])
assert Item.objects.aggregate(models.Sum("number"))["number__sum"] == sum(range(60))
assert Item.objects.select_for_update().filter(number=1).count() == 1
item, created = Item.objects.get_or_create(name="again", defaults={"number": 5})
assert created and not Item.objects.get_or_create(name="again")[1]
for n in range(1, 40):
    assert Item.objects.filter(number__in=list(range(n))).count() >= n - 1
with connection.schema_editor() as editor:
    editor.delete_model(Item)
connection.close()
print("ok")
